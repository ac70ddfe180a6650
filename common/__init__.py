"""What every other package uses: command line, ranks, files, seeds, precision, errors."""
