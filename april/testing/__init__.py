"""Contract kits that a plug-in's author runs, and toy models for tests."""
