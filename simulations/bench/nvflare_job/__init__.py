"""What NVFLARE runs, with its own Python: a FedAvg job and what its clients do."""
