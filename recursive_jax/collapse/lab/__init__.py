"""The laboratory: recursive training of models whose fit is a formula. A whole chain of rounds is one program,
thousands of replicates run side by side, and where theory has a law its value stands beside the measured one.

    from recursive_jax import lab
    result = lab("gaussian", samples=20, rounds=50, regime="fresh", fraction=0.1, replicates=20_000)
    result.mean["variance"], result.stderr["variance"], result.expected["variance"]      # one value for each round
"""
