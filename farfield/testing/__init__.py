"""What the tests stand on: numerical units, exact inputs, literal oracles and the contract of every mechanism."""
