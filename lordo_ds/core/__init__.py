"""The mathematics of LoRDO (arXiv 2602.04396) as pure functions of tensors and integers.

Nothing here knows of processes, DeepSpeed or Megatron. Matrices are *oriented*: the side that carries
the basis comes first, so one formula serves both sides (a matrix with its basis on the columns is handed
over as its transposed view). Letters used inside the functions, and the words used outside:

    s, l   length of the side with the basis, length of the other side
    r      subspace rank
    Q      basis, (s, r), orthonormal columns
    G      gradient, clipped inside the replica, (s, l)
    E      error: what projection dropped so far, (s, l)
    A      G + E
    u, v   exp_avg, exp_avg_sq: Adam moments in the subspace, (r, l)
    t      executed steps of a parameter;  b1, b2 = betas;  c1 = 1 - b1^t, c2 = 1 - b2^t
    D      pseudo-gradient: anchor minus the mean of the replicas' parameters
    omega  weight of the momentum in the quasi-hyperbolic update; 1 - omega weighs the raw gradient
"""
