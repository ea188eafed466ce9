"""What a tour is made with: minutes go in, and the size of its story, threads and precision, and lessons come out."""
