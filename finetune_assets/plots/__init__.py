"""Small plots of results: functions that turn numbers into matplotlib figures in one style."""
