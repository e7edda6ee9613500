"""Tools: functions that a model may call, and the turns in which it does."""
