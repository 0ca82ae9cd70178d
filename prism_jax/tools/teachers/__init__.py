"""Look at networks and weight files before a run: python -m prism_jax.tools.teachers COMMAND

    list                                 the networks that can be teachers and students
    import FILE --architecture=NAME      what a weight file is; --out=DIR keeps it in our format
    evaluate FILE --architecture=NAME --dataset=NAME --source=KIND --path=PATH
                                         its accuracy on real images, and the usual mistakes

Two mistakes are recognised: classes in another order than the network's, and pixels normalised in
another way than at its training. Either gives a network that looks untrained.
"""
