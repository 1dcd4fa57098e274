"""The heart: a pool that owns every sample, schedules that decide, a driver that carries out. No torch."""
