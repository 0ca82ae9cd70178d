"""The second engine: images from a denoiser. Pure functions of (params, arrays).

protocols.py    what it asks of its networks: codec, denoiser, condition
noise.py        schedules of noise, and what a prediction says
samplers.py     from noise, or an anchor under noise, to a latent
guidance.py     what draws a sample: its class, and further terms
generate.py     the heart: a batch from anchors to images
anchors.py      the points of latent space that a class starts from
select.py       which of several candidates are taken
refine.py       what is moved in a latent before it is decoded
pixels.py       images in [-1, 1], from pixels and back
patches.py      codecs that need no training
fit.py          a small denoiser, trained from nothing
quality.py      what generated images are worth

dit.py unet.py autoencoder.py clip.py blocks.py forms.py    the networks
huggingface.py prompts.py                                   their files, and classes in words
"""
