"""What a guest's network card is connected to: taps, passt, sockets, other guests."""
