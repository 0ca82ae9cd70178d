"""Every field of an experiment with PRISM's values; the other configs change what differs.

PRISM: priors from diverse source models (arXiv 2511.09905, TMLR 2026). The numbers are those of
its supplement, tables 1 and 2. Where the released code does otherwise, see `official`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# The pool of the paper's main runs; the first is the primary.
POOL = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")


def get_config(arg: str = "") -> ConfigDict:
    del arg
    c = ConfigDict()
    c.name = "prism"
    c.preset = "prism"
    c.seed = 0  # initialisation, draws and views of recover; views and mixes of relabel

    c.dataset = ConfigDict()
    c.dataset.name = "imagenet"
    c.dataset.source = "folder"
    c.dataset.path = placeholder(str)
    c.dataset.image_size = 224
    c.dataset.num_classes = 1000
    c.dataset.damaged = "stop"  # or "skip": a damaged image is left out and reported
    c.dataset.threads = 4  # that read ahead
    c.dataset.workers = 0  # processes that read ahead instead
    c.dataset.cache_gigabytes = 2.0  # a larger set is decoded whenever it is read
    c.dataset.mean = placeholder(tuple)  # unset: the data set's own
    c.dataset.std = placeholder(tuple)
    c.dataset.held_out = 0.0  # of every class' training images: nothing is made of them
    c.dataset.held_out_seed = 0

    c.networks = ConfigDict()  # name -> architecture, width, depth, stem, checkpoint, ...

    c.squeeze = ConfigDict()
    c.squeeze.teachers = POOL
    c.squeeze.epochs = 90
    c.squeeze.least_steps = 0  # of a training: a set of few images gets more epochs
    c.squeeze.batch_size = 256
    c.squeeze.optimiser = "sgd"
    c.squeeze.learning_rate = 0.1
    c.squeeze.weight_decay = 1e-4
    c.squeeze.schedule = "cosine"
    c.squeeze.crop_min = 0.08
    c.squeeze.crop_pad = placeholder(int)  # a padded crop in place of a resized one
    c.squeeze.flip = True
    c.squeeze.seed = 0
    c.squeeze.dtype = "float32"  # or "bfloat16": of the networks' computation, as below
    c.squeeze.least_top1 = placeholder(float)  # unset: more than chance; 0: any teacher will do

    c.recover = ConfigDict()
    c.recover.maker = "optimise"  # or "generate": the section `generate` says how
    c.recover.method = "prism"
    c.recover.ipc = 10
    c.recover.iterations = 4000
    c.recover.budget = "constant"
    c.recover.rounds = 8  # of "early_late"
    c.recover.learning_rate = 0.05
    c.recover.schedule = "cosine"
    c.recover.betas = (0.5, 0.9)  # of Adam
    # Who supervises: fixed, subset, round_robin, uniform or committee; unset: as the method does.
    c.recover.primary = "resnet18"
    c.recover.pool = POOL
    c.recover.logits_by = placeholder(str)
    c.recover.statistics_by = placeholder(str)
    c.recover.statistic_primary = placeholder(str)  # of statistics alone; unset: the primary
    c.recover.granularity = "per_slot"
    c.recover.subset_others = 3
    c.recover.subset_probability = 0.5  # 1: always so many others
    c.recover.committee = "random"  # a pair per slot; "listed": all in turn; "best": by prior
    c.recover.priors = placeholder(tuple)  # of a committee, percent; unset: equal votes
    c.recover.prior_temperature = 5.0
    c.recover.round_robin_restarts = False  # with every batch, instead of going on
    c.recover.alpha_ce = 1.0  # of the logits; 0: only what is matched beside them
    # Statistics: of BatchNorms' inputs, of convolutions' by channel ("conv") and by "patch".
    c.recover.alpha_bn = 0.01
    c.recover.first_bn_multiplier = 10.0
    c.recover.first_layer = "bn"  # which first layer has the multiplier
    c.recover.count_no_bn = False
    c.recover.match = ("bn",)
    c.recover.targets = "running"  # of BatchNorms; "groups": of images as difficult as the slot
    c.recover.variance_weight = 1.0
    c.recover.statistic_patch = 16  # side of a patch
    c.recover.class_share = 0.0  # of the target that is the batch's classes', not all images'
    c.recover.class_patch_swapped = False  # as EDC's code stores them
    c.recover.ema = 0.0  # momentum of the statistics that are matched; 0: the batch's own
    c.recover.ema_from_zero = False
    c.recover.drop = 0.0  # probability with which a convolution is left out
    c.recover.alignment_scale = "none"  # "layers", "targets": as large as the primary's
    # Weights of terms beside them, and of the perturbation of the primary.
    c.recover.total_variation = 0.0
    c.recover.image_l2 = 0.0
    c.recover.densification = 0.0
    c.recover.flatness = 0.0
    c.recover.clip = 0.0  # towards what a CLIP's text encoder says of the class
    c.recover.clip_directory = placeholder(str)  # of both its encoders and its tokenizer
    c.recover.clip_template = "a photo of a {}"  # names: generate.class_names
    c.recover.perturb_rho = 0.0
    c.recover.perturb_steps = 0
    c.recover.perturb_probes = False
    c.recover.perturb_accumulates = False
    c.recover.parametrisation = "pixels"  # "pyramid": components of several resolutions
    c.recover.resolutions = ()  # theirs; unset: 1, 2, 4, ... and the image's own
    # Batches.
    c.recover.batch_size = placeholder(int)  # unset: all classes, at most 100
    c.recover.slots_per_batch = placeholder(int)  # unset: 1 (class_major: all)
    c.recover.batch_order = "ipc_major"
    # Initial images; a scorer (unset: the primary) chooses those of "mosaic", of "real_median" and
    # of the selections, and finds what is retrieved.
    c.recover.initialise = "real"
    c.recover.initialise_from = placeholder(str)
    # What the files of that set do not say: its classes in the order of the labels ("text" or
    # "numbers": sorted so), and the space of float images.
    c.recover.initialise_classes = placeholder(tuple)
    c.recover.initialise_mean = placeholder(tuple)
    c.recover.initialise_std = placeholder(tuple)
    c.recover.initialise_whitening = placeholder(str)  # "none" or "zca"
    c.recover.short_classes = "refuse"  # "repeat": with fewer than ipc images, one comes again
    c.recover.scorer = placeholder(str)
    c.recover.patch_factor = 2  # patches per side of a mosaic
    c.recover.patch_images = 300  # real images of a class that are looked at
    c.recover.patch_crops = 5  # crops of each
    c.recover.patch_choice = "confident"
    # Phases of other sizes, and the share of the initial image that each begins with.
    c.recover.phase_sizes = ()
    c.recover.inject = 0.0
    c.recover.inject_from = "start"  # or "retrieved": the real image nearest in features
    c.recover.inject_simplicity = 0.1  # what being simple counts in that, beside being near
    c.recover.crop_min = 0.08
    c.recover.crop_curriculum = "constant"  # or from the whole image down: cosine, linear, step
    c.recover.crop_milestone = 1.0  # the part of the run in which it falls
    c.recover.crop_pad = placeholder(int)  # a padded crop in place of a resized one
    c.recover.flip = True
    c.recover.roll = 32
    c.recover.roll_centred = False
    c.recover.view_noise = 0.0  # its deviation, of pixels in [0, 1]
    c.recover.rounding = "nearest"
    c.recover.jpeg_quality = placeholder(int)  # unset: lossless
    c.recover.steps_per_dispatch = 50
    c.recover.dtype = "float32"
    c.recover.checkpoint_seconds = 60.0
    c.recover.keep_at = ()  # iterations after which a class's first image is kept, to be looked at

    # Images from a denoiser; D4M's values, but for its networks.
    c.generate = ConfigDict()
    c.generate.generator = "dit"  # trained by squeeze; "stable_diffusion", "dit_released": read
    c.generate.directory = placeholder(str)  # of theirs, as Hugging Face's
    c.generate.transformer = placeholder(str)  # a DiT's file in the released code's layout
    c.generate.codec = "none"  # "patches": principal components; "directory": its autoencoder
    c.generate.patch = 4  # side of a patch
    c.generate.components = 8  # that are kept of each
    c.generate.denoiser = ConfigDict()
    c.generate.denoiser.token = 8  # side, in the latent
    c.generate.denoiser.width = 128
    c.generate.denoiser.depth = 4
    c.generate.denoiser.heads = 4
    c.generate.fit = ConfigDict()
    c.generate.fit.steps = 3500
    c.generate.fit.batch_size = 64
    c.generate.fit.learning_rate = 2e-3
    c.generate.fit.warmup = 100  # steps in which the rate rises
    c.generate.fit.class_dropout = 0.1  # how often a class is hidden, for guidance
    c.generate.fit.average = 0.998  # decay of the average of weights that is kept
    c.generate.class_names = placeholder(str)  # a file, a line a class; unset: the data set's
    c.generate.template = "{}"  # prompt of a class
    c.generate.negative = ""  # what guidance leads away from
    c.generate.dtype = "float32"
    c.generate.batch_size = 100  # images at once on a device
    # Real images, their latents and the anchors of a class.
    c.generate.encode_batch_size = placeholder(int)  # of real images; unset: batch_size
    c.generate.image_size = placeholder(int)  # that the codec reads; unset: the data set's
    c.generate.view = "cropped"  # of images of another size; "squashed": their sides apart
    c.generate.most_images = placeholder(int)  # of a class; unset: all
    c.generate.sampled = False  # latents from the codec's posterior, instead of its mean
    c.generate.flip = False  # a random half of the images is mirrored
    c.generate.anchors = "kmeans"  # minibatch, chunked, chunked_released, medoid, none
    c.generate.expand = 10  # chunks of the chunked have so many times ipc latents
    c.generate.attempts = 1
    c.generate.outliers = 0.0  # the share that is left out
    c.generate.weighted = False  # students weigh images by the share of their anchor
    # Sampling.
    c.generate.sampler = "ddim"  # ddpm, pndm
    c.generate.steps = 50
    c.generate.strength = 0.7  # 0: the anchors, decoded; 1: no anchor
    c.generate.guidance = 1.5  # 1: none
    c.generate.guided_channels = placeholder(int)
    c.generate.eta = 0.0  # of DDIM's noise, 0 to 1
    c.generate.variance = "small"  # of ddpm: large, learned
    c.generate.slip = False  # PNDM as released
    c.generate.clip = True  # estimates, to what latents of real images lie between
    c.generate.mode_weight = 0.0  # towards the anchor (MGD3)
    c.generate.mode_window = placeholder(tuple)  # first and last step, down to 0; unset: all
    c.generate.candidates = 1  # for each image, of which the judge takes the surest (CaO2)
    c.generate.refine = ConfigDict()  # of latents, before they are decoded (CaO2)
    c.generate.refine.steps = 0  # of Adam; 0: none
    c.generate.refine.learning_rate = 6e-4
    c.generate.refine.maximum = 10.0  # what the largest error counts beside the mean square
    c.generate.refine.window = (1, 11)  # at the times of these steps of the sampler, down to 0
    c.generate.judge = placeholder(str)  # unset: analyse.network, or the first that labels
    c.generate.resampler = "bicubic"  # to the data set's size

    c.relabel = ConfigDict()
    c.relabel.mode = "store"  # or "online": labels are made while students train
    c.relabel.order = "own"  # or "torch": SRe2L's code then reads exported labels as they are
    c.relabel.labels_from = placeholder(str)  # FKD labels in a folder; "set": those of the images
    c.relabel.teachers = ("resnet18",)
    c.relabel.ensemble = "single"
    c.relabel.priors = placeholder(tuple)  # of "committee", percent
    c.relabel.prior_temperature = 10.0
    c.relabel.teacher_mode = "eval"  # "train": BatchNorm uses the statistics of the batch
    c.relabel.bn_group = placeholder(int)  # or of groups of so many images
    c.relabel.epochs = 300
    c.relabel.batch_size = 50
    c.relabel.crop_min = 0.25
    c.relabel.flip = True
    c.relabel.mix = "cutmix"
    c.relabel.mix_alpha = 1.0
    c.relabel.mix_per = "batch"
    c.relabel.crop_pad = placeholder(int)
    c.relabel.patch_shuffle = 1  # bands of rows and of columns that are exchanged; 1: none
    c.relabel.precision = "float16"
    c.relabel.top_k = placeholder(int)  # unset: all classes
    c.relabel.dtype = "float32"

    c.validate = ConfigDict()
    c.validate.students = ("resnet18",)
    c.validate.seeds = (0,)
    c.validate.loss = "mse_gt"
    c.validate.ce_weight = 0.1
    c.validate.temperature = 20.0  # of "kl", "kl_t2" and "dist"; "mse_gt" has none
    c.validate.epochs = 300
    c.validate.batch_size = 50
    c.validate.accumulate = 2  # BatchNorm sees 25 images at a time
    c.validate.bn_group = placeholder(object)  # unset: batch_size / accumulate; "all"
    c.validate.optimiser = "adamw"
    c.validate.learning_rate = 1e-3
    c.validate.weight_decay = 0.01
    c.validate.decay = "kernels"  # or "all": biases and norms too
    c.validate.momentum = 0.9  # of "sgd"
    c.validate.nesterov = False
    c.validate.schedule = "cos2"  # the "decayed cosine", as released
    c.validate.zeta = placeholder(float)  # unset: the schedule's own
    c.validate.milestones = placeholder(tuple)  # of "multistep", fractions of the run
    c.validate.gamma = placeholder(float)
    c.validate.warmup_epochs = 0
    c.validate.warmup_start = 0.01
    c.validate.ema = placeholder(float)  # decay of the average that is tested
    c.validate.ema_statistics = True  # of BatchNorms' running statistics too
    c.validate.dtype = "float32"
    c.validate.eval_every = 10
    c.validate.controls = ("random_real", "random_real_hard", "full_real")  # synthetic_hard
    c.validate.checkpoint_seconds = 60.0

    c.analyse = ConfigDict()
    c.analyse.network = placeholder(str)  # whose features measure diversity
    c.analyse.grid_classes = 10  # that the grid of images shows,
    c.analyse.grid_slots = 10  # and images of each

    c.parallel = ConfigDict()
    c.parallel.map = "shard_map"
    c.parallel.recover_devices = 1  # that share an image batch
    c.parallel.train_devices = placeholder(int)  # unset: as many as share a batch
    c.parallel.deterministic = True  # of a GPU: the same bits again; False promises none
    c.parallel.matmul_precision = "high"  # of float32 on a GPU or TPU: docs/precision.md
    return c


def network(**fields) -> ConfigDict:
    """One entry of `networks`; see prism_jax.config.Network for the fields."""
    c = ConfigDict({"width": 1.0, "depth": 1.0, "stem": "imagenet"})
    c.checkpoint = placeholder(str)
    c.mean = placeholder(tuple)
    c.std = placeholder(tuple)
    c.head_classes = placeholder(int)
    c.class_indices = placeholder(tuple)
    c.weights_key = placeholder(str)
    c.start_from = placeholder(str)
    c.update(fields)
    return c


def words(arg: str, *allowed: str) -> set[str]:
    """The words of a config's argument, which commas separate."""
    found = {word for word in arg.split(",") if word}
    if unknown := found - set(allowed):
        raise ValueError(
            f"unknown argument {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}"
        )
    return found


def folder(c: ConfigDict) -> ConfigDict:
    """Relabel and validate images that somebody else made: recover.initialise_from=DIR."""
    c.name += "_folder"
    c.recover.initialise = "folder"
    c.recover.iterations = 0
    c.recover.jpeg_quality = None  # theirs are as they are
    c.recover.pool = ()
    needed = (*c.relabel.teachers, c.analyse.network)
    c.squeeze.teachers = tuple(name for name in c.squeeze.teachers if name in needed)
    return c


def official(c: ConfigDict) -> ConfigDict:
    """The preset `prism_official`: what the released code does where it differs.

    AlexNet, which has no BatchNorm, is in the pool and counts in the mean; iterations fall from
    4000 to 500 with the slot; four networks label; pixels are truncated and pass through JPEG.
    """
    c.preset = "prism_official"
    c.squeeze.teachers = (*POOL, "alexnet")
    c.recover.pool = (*POOL, "alexnet")
    c.recover.count_no_bn = True
    c.recover.budget = "mod8"
    c.recover.rounding, c.recover.jpeg_quality = "truncate", 75
    c.relabel.teachers = ("resnet18", "mobilenet_v2", "alexnet", "shufflenet_v2_x0_5")
    c.relabel.ensemble = "norm_mean"
    return c
