"""What a decoder does inside: where its heads look, what each layer would say, how probable a text is."""
