"""C++ for a CPU, built where it runs and when it is first used, which needs a compiler."""
