"""Finding in a graph what a target's compiler would refuse, without the compiler."""
