"""The fixtures of native_library, for every test here."""

from native_library import build_folder, library

__all__ = ["build_folder", "library"]
