"""What a disk holds: partition tables, filesystems and their used blocks, volumes, and exact cuts."""
