"""Driver and runtime: transports, devices, queues, memory and hybrid inference."""
