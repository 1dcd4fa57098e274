"""The engines that are compared, each behind the same three methods, each in a process of its own."""
