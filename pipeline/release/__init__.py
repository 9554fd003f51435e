"""Versions on disk: storing, sealing and checking them, moving the current one, packing one for a device."""
