"""The models that are taught. `create_student` makes one by name."""

from __future__ import annotations

from trainer.students.base import Backbone, Student, StudentOutput
from trainer.students.registry import STUDENTS, create_student, list_students

__all__ = ["STUDENTS", "Backbone", "Student", "StudentOutput", "create_student", "list_students"]
