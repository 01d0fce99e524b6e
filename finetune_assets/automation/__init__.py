"""Automation: sensors, schedules and conditions that start runs, and alerts."""
