"""The same schedules in virtual time: workloads, hardware costs, a trainer that only takes time, studies. No torch."""
