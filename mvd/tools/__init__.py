"""What every script needs and no paper mentions: command line, run folder, pictures, device, files."""
