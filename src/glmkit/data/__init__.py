"""Records of data files, and the token ids and labels that training makes of them."""
