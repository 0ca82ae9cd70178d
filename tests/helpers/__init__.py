"""What several tests share: small networks with weights of order one, and ways to run them."""
