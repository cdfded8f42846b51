"""What tests share: runs, crews of processes, faults, damaged files, tolerances."""
