"""What a person sees of a tour: parts, shares and findings go in, progress, sentences and one page come out."""
