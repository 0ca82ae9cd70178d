"""Audit what sets and their students give away of the training images. No claim follows from it.

rows.py       a row's experiment, on the images of a run
canaries.py   which images every shadow run has, and the files it is made from
shadows.py    the runs: cells of a comparison, each with teachers that saw its images
observing.py  what an attacker sees of a finished run
gradients.py  the noise of drawn teachers beside what one training image changes

    <workdir>/plan.json                     the canaries, and who has which
    <workdir>/shadows/<run>/<kind>.npz      what a run trains on; <kind>/squeeze/ its teachers
    <workdir>/cells/<row>/.../cell.json     what was observed of a run; written last
    <workdir>/gradients/  gradients.json    the study of gradients
"""
