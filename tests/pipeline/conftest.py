"""The fixtures of these tests."""

from tests.support.stage_fixtures import shardferry, trainers_with, two_trainers

__all__ = ["shardferry", "trainers_with", "two_trainers"]
