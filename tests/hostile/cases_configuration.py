"""Mistakes in options and configuration files."""

from hostile.world import Case, edit_yaml, fit, write

OPTIMIZER = "lightning_fp8.optim.FP8AdamW"
SCHEDULE = "lightning_fp8.optim.WarmupCosine"


def in_yaml(at, **fields):
    """Adds fields to a level of the configuration."""

    def change(content):
        for level in at.split(".") if at else ():
            content = content[int(level) if level.isdigit() else level]
        content.update(fields)

    return lambda: edit_yaml(change)


def callback(class_path, **init_args):
    return in_yaml("trainer.callbacks.0", class_path=class_path, init_args=init_args)


def optimizer(*options):
    return fit(f"--model.optimizer={OPTIMIZER}", *options)


CASES = [
    # A key that there is not, at every level, in a file or on the command line.
    Case("empty group", fit(), 2, ("trainr", "config.yaml: trainr", "'trainer'"), in_yaml("", trainr={})),
    Case("empty trainer key", fit(), 2, ("max_stepz", "'trainer.max_steps'"), in_yaml("trainer", max_stepz={})),
    Case("empty model key", fit(), 2, ("model.confg", "'model.config'"), in_yaml("model", confg={})),
    Case("empty config key", fit(), 2, ("hiden_size", ".hidden_size'"), in_yaml("model.config", hiden_size={})),
    Case("empty fp8 key", fit(), 2, ("fp8.recip ", "'fp8.recipe'"), in_yaml("fp8", recip={})),
    Case(
        "empty argument",
        fit(),
        2,
        ("every_n_step ", "config.yaml: trainer.callbacks.0", "'every_n_steps'"),
        callback("lightning_fp8.callbacks.LastCheckpoint", every_n_step={}),
    ),
    Case("empty recipe key", fit(), 1, ("FP8 recipe", "inputt", "'input'"), in_yaml("fp8", recipe={"inputt": {}})),
    Case("null", fit(), 2, ("fp8.recip ", "config.yaml:", "'fp8.recipe'"), in_yaml("fp8", recip=None)),
    Case(
        "class_path",
        fit(),
        2,
        ("class_pth", "config.yaml:", "'class_path'"),
        in_yaml("trainer", callbacks=[{"class_pth": "lightning_fp8.callbacks.LastCheckpoint"}]),
    ),
    Case(
        "init_args",
        fit(),
        2,
        ("init_arg.every", "config.yaml:", "'init_args'"),
        in_yaml("trainer.callbacks.0", init_arg={"every_n_steps": 3}),
    ),
    Case("group", fit(), 2, ("trainr.a", "config.yaml: trainr.a", "'trainer'"), in_yaml("", trainr={"a": 1})),
    Case(
        "trainer key", fit(), 2, ("max_stepz", "config.yaml:", "'trainer.max_steps'"), in_yaml("trainer", max_stepz=1)
    ),
    Case("trainer option", fit("--trainer.max_stepz", "3"), 2, ("max_stepz", "(in --trainer", "'trainer.max_steps'")),
    Case("model key", fit(), 2, ("model.confg", "config.yaml:", "'model.config'"), in_yaml("model", confg=3)),
    Case(
        "config key", fit(), 2, ("hiden_size", "config.yaml:", ".hidden_size'"), in_yaml("model.config", hiden_size=3)
    ),
    Case("data key", fit(), 2, ("data.batchsize", "config.yaml:", "'data.batch_size'"), in_yaml("data", batchsize=3)),
    Case("fp8 key", fit(), 2, ("fp8.recip ", "config.yaml:", "'fp8.recipe'"), in_yaml("fp8", recip="delayed")),
    Case("recipe key", fit(), 1, ("FP8 recipe", "inputt", "'input'"), in_yaml("fp8", recipe={"inputt": {}})),
    Case(
        "operand key",
        fit(),
        1,
        ("FP8 recipe", "field of input 'fromat'", "'format'"),
        in_yaml("fp8", recipe={"input": {"fromat": "e5m2"}}),
    ),
    Case(
        "optimizer's argument",
        fit(),
        2,
        ("lrr", OPTIMIZER, "config.yaml: model.optimizer.init_args.lrr", "'lr'"),
        in_yaml("model", optimizer={"class_path": OPTIMIZER, "init_args": {"lrr": 1}}),
    ),
    Case(
        "callback's argument",
        fit(),
        2,
        ("every_n_step ", "config.yaml: trainer.callbacks.0", "'every_n_steps'"),
        callback("lightning_fp8.callbacks.LastCheckpoint", every_n_step=1),
    ),
    Case("prepare's option", ["prepare", "--vocab_sise", "3"], 2, ("vocab_sise", "--vocab_sise", "'vocab_size'")),
    Case("a word too many", fit("hello"), 2, ("hello", "is not an option")),
    Case("no such verb", ["fitt"], 2, ("'fitt'", "prepare")),
    # Class paths.
    Case(
        "class that is not there",
        fit(),
        2,
        ("trainer.callbacks", "config.yaml:", "no LastChekpoint", "'LastCheckpoint'"),
        callback("lightning_fp8.callbacks.LastChekpoint"),
    ),
    Case(
        "module that is not there",
        fit(),
        2,
        ("trainer.callbacks", "config.yaml:", "'nowhere'", "correct the class path"),
        callback("nowhere.Callback"),
    ),
    Case(
        "class of another kind",
        fit(),
        2,
        ("trainer.callbacks", "config.yaml:", "lightning_fp8.Recipe", "subclass of Callback", "correct"),
        callback("lightning_fp8.Recipe"),
    ),
    Case(
        "optimizer that is not there",
        fit("--model.optimizer", "lightning_fp8.optim.FP8Adam"),
        2,
        ("model.optimizer", "(in --model.optimizer)", "'FP8AdamW'"),
    ),
    Case("logger that is not there", fit("--trainer.logger", "no.Log"), 2, ("no.Log", "--trainer.logger", "correct")),
    # Files that are no configuration.
    Case("no file", ["fit", "-c", "no.yaml"], 2, ("--config no.yaml", "no such file")),
    Case("broken YAML", fit(), 2, ("config.yaml:", "correct"), lambda: write("config.yaml", "a: 1\nb: [c\n")),
    Case("binary YAML", fit(), 2, ("config.yaml", "UTF-8", "YAML"), lambda: write("config.yaml", bytes(range(256)))),
    Case("empty YAML", fit(), 2, ("config.yaml", "no mapping", "trainer:"), lambda: write("config.yaml", "")),
    Case("list for YAML", fit(), 2, ("config.yaml", "no mapping", "trainer:"), lambda: write("config.yaml", "- 1")),
    Case(
        "YAML in YAML in YAML", fit(), 2, ("config.yaml", "deep", "mapping"), lambda: write("config.yaml", "[" * 5000)
    ),
    Case("number for a key", fit(), 2, ("config.yaml: 3", "no name", "trainer:"), lambda: write("config.yaml", "3: 4")),
    # Something else where options are to stand.
    *(
        Case(
            f"{value} for {group} of {at or 'all'}",
            fit(),
            2,
            (group, "config.yaml:", "mapping"),
            in_yaml(at, **{group: value}),
        )
        for at, group in (("", "model"), ("", "trainer"), ("", "data"), ("", "fp8"), ("model", "config"))
        for value in (None, [1], "llama")
    ),
    Case(
        "callbacks by number",
        fit(),
        2,
        ("trainer.callbacks is 3", "config.yaml:", "list"),
        in_yaml("trainer", callbacks=3),
    ),
    Case(
        "arguments in a list",
        fit(),
        2,
        ("trainer.callbacks", "config.yaml:"),
        in_yaml("trainer.callbacks.0", init_args=[1, 2]),
    ),
    Case(
        "saves at null",
        fit(),
        1,
        ("LastCheckpoint.every_n_steps is None", "1 or more"),
        callback("lightning_fp8.callbacks.LastCheckpoint", every_n_steps=None),
    ),
    Case("recipe null", fit(), 1, ("FP8 recipe", "None", "tensorwise"), in_yaml("fp8", recipe=None)),
    Case(
        "recipe in a list", fit(), 2, ("fp8.recipe is [1]", "config.yaml:", "str or dict"), in_yaml("fp8", recipe=[1])
    ),
    Case("data nowhere", fit(), 1, ("data.path is None", "lightning-fp8 prepare"), in_yaml("data", path=None)),
    # Values of other types, unknown names.
    Case("word for a number", fit("--data.batch_size", "many"), 2, ("batch_size", "many", "--data.", "type int")),
    Case("fraction", fit("--model.config.num_layers", "1.5"), 2, ("num_layers", "1.5", "--model.", "type int")),
    Case("list for a number", fit(), 2, ("max_steps", "config.yaml:", "int"), in_yaml("trainer", max_steps=[1])),
    Case("preset", fit("--fp8.recipe", "tensorwize"), 1, ("FP8 recipe", "tensorwize", "'tensorwise'")),
    Case("format", fit("--fp8.recipe", "{input: {format: e4m4}}"), 1, ("FP8 recipe", "format 'e4m4'", "'e4m3'")),
    Case("backend", fit("--fp8.backend", "nativ"), 2, ("fp8.backend", "nativ", "(in --fp8", "'native'")),
    Case("backend of a GPU", fit("--fp8.backend", "native"), 1, ("'native' cannot run", "CUDA", "'emulated'")),
    Case("weights", fit("--fp8.weights", "fp17"), 2, ("fp8.weights", "(in --fp8", "fp32, bf16")),
    Case("moments", optimizer("--model.optimizer.moments=fp9"), 2, ("moments", "(in --model", "'fp8'")),
    Case("strategy", fit("--trainer.strategy=ddpp"), 1, ("strategy='ddpp'", "Example choices")),
    Case("accelerator", fit("--trainer.accelerator=gpuu"), 1, ("accelerator='gpuu'", "Available names")),
    # Numbers out of range.
    Case("lr nan", optimizer("--model.optimizer.lr=nan"), 2, ("lr is nan", "--model.optimizer.lr", "finite")),
    Case("lr below 0", optimizer("--model.optimizer.lr=-1"), 1, ("FP8AdamW", "lr is -1.0", "0 or more")),
    Case("beta", optimizer("--model.optimizer.betas=[0.9, 2]"), 1, ("FP8AdamW", "betas", "[0, 1)")),
    Case("rope nan", fit("--model.config.rope_theta=nan"), 2, ("rope_theta is nan", "(in --model", "finite")),
    Case("width 0", fit("--model.config.hidden_size=0"), 1, ("DecoderConfig.hidden_size", "at least 1")),
    Case("layers", fit("--model.config.num_layers=99999999999"), 1, ("DecoderConfig.num_layers", "at most")),
    Case("memory", fit("--model.config.hidden_size=2000000000"), 1, ("not enough memory", "smaller", "estimate")),
    Case("batch 0", fit("--data.batch_size=0"), 1, ("batch_size 0", "at least 1")),
    Case(
        "clipping below 0", fit("--trainer.gradient_clip_val=-1"), 1, ("trainer.gradient_clip_val is -1", "0 or more")
    ),
    Case(
        "accumulation 0", fit("--trainer.accumulate_grad_batches=0"), 1, ("accumulate_grad_batches is 0", "1 or more")
    ),
    Case("processes", fit("--trainer.devices=99999"), 1, ("trainer.devices is 99999", "cores", "or less")),
    Case("processes below 0", fit("--trainer.devices=-3"), 1, ("trainer.devices is -3", "1 or more")),
    Case("processes by number", fit("--trainer.devices=[0, 1]"), 1, ("trainer.devices is [0, 1]", "1 or more")),
    Case(
        "strategy's class",
        fit("--trainer.strategy=lightning.pytorch.strategies.Nope"),
        1,
        ("strategies.nope", "an instance of", "complete list of options"),
    ),
    Case("nodes", fit("--trainer.num_nodes=99999"), 1, ("trainer.num_nodes is 99999", "srun or torchrun")),
    Case("nodes below 1", fit("--trainer.num_nodes=0"), 1, ("trainer.num_nodes is 0", "1 or more")),
    Case("processes in words", fit("--trainer.devices=many"), 1, ("trainer.devices is many", "1 or more")),
    Case("logging below 0", fit("--trainer.log_every_n_steps=-1"), 1, ("log_every_n_steps is -1", "0 or more")),
    Case("validation every 0", fit("--trainer.val_check_interval=0"), 1, ("val_check_interval is 0", "limit_val")),
    Case("tokens without end", fit("--trainer.max_steps=-1", "--max_tokens=1e400"), 1, ("max_tokens '1e400'", "300M")),
    Case("global batch", fit(f"--global_batch={10**22}"), 1, ("global_batch is 1000", "from 1 to")),
    Case("block", optimizer(f"--model.optimizer.block_size={10**20}"), 1, ("block_size is 1000", "from 1 to")),
    Case("lr without end", optimizer("--model.optimizer.lr=1e400"), 1, ("lr is inf", "finite")),
    Case("rope 0", fit("--model.config.rope_theta=0"), 1, ("rope_theta is 0", "above 0")),
    Case("eps of the norms", fit("--model.config.norm_eps=-1"), 1, ("norm_eps is -1", "above 0")),
    Case("steps below 0", fit("--trainer.max_steps=-5"), 1, ("max_steps", "-5", "non-negative")),
    Case(
        "warmup",
        fit(f"--model.schedule={SCHEDULE}", "--model.schedule.warmup_steps=-5"),
        1,
        (".warmup_steps is -5", "0"),
    ),
    Case("saves", fit("--trainer.callbacks.every_n_steps=0"), 1, ("LastCheckpoint.every_n_steps is 0", "1 or more")),
    Case("seed", fit("--seed_everything=-1"), 1, ("seed_everything: -1", "from 0 to")),
    Case("tokens", fit("--trainer.max_steps=-1", "--max_tokens=much"), 1, ("max_tokens 'much'", "300M")),
    # Of what only looks at a configuration.
    Case("plan without a batch", ["plan", *fit("--data.batch_size=0")[1:]], 1, ("data.batch_size is 0", "1 or more")),
    Case(
        "estimate without a sequence",
        ["estimate", *fit("--hardware=h100", "--data.sequence_length=-1")[1:]],
        1,
        ("data.sequence_length is -1", "1 or more"),
    ),
    Case(
        "estimate without end",
        ["estimate", *fit("--model.config.hidden_size=2000000000")[1:]],
        1,
        ("not enough memory", "smaller"),
    ),
    Case("plan without FP8", ["plan", *fit("--fp8.enabled=false")[1:]], 1, ("fp8.enabled is false", "true")),
    Case("device of no datasheet", ["plan", *fit("--device=h900")[1:]], 2, ("--device", "'h900'", "'h100'")),
    # Of comparisons.
    Case(
        "comparison of a key", ["parity", *fit("--steps=2", "--trainer.max_stepz=3")[1:]], 2, ("max_stepz", "'trainer.")
    ),
    Case("comparison of no file", ["parity", "-c", "no.yaml"], 2, ("--config no.yaml", "no such file", "'bf16'")),
    Case("seed below 0", ["parity", *fit("--steps=2", "--seeds", "-1")[1:]], 1, ("--seeds -1", "from 0 to")),
    Case("bar of nan", ["parity", *fit("--steps=2", "--bar=nan")[1:]], 1, ("--bar nan", "above 0")),
    Case(
        "nothing to compare",
        ["parity", *fit("--steps=2", "--trainer.limit_val_batches=0")[1:]],
        1,
        ("limit_val_batches is 0", "'bf16'", "number of batches"),
    ),
    Case("rates of nan", ["sweep-lr", *fit("--steps=2", "--rates", "nan", "1")[1:]], 1, ("--rates", "finite")),
    Case("arm that is not there", ["parity", *fit("--arms", "bf16", "fp9")[1:]], 1, ("'fp9'", "there are", "overlay")),
    Case("no runs", ["parity", "--runs", "bf16=run", "fp8=nowhere"], 1, ("nowhere", "no")),
    # What does not go together.
    Case("heads", fit("--model.config.num_heads=3"), 1, ("DecoderConfig", "3 heads", "change num_heads")),
    Case(
        "sizes that FP8 cannot have",
        fit("--model.config.hidden_size=36", "--model.config.intermediate_size=36"),
        1,
        ("blocks.0.attention.q_proj", "multiples of 16", "Remove the plugin"),
    ),
    Case("precision", fit("--trainer.precision=bf16-mixed"), 1, ("fp8.enabled", "trainer.precision", "leave")),
    Case(
        "plugin twice", fit("--trainer.plugins=lightning_fp8.FP8Precision"), 1, ("trainer.plugins", "leave that plugin")
    ),
    Case("FSDP1", fit("--trainer.strategy=fsdp"), 1, ("FSDPStrategy", "trainer.strategy", "ModelParallelStrategy")),
    Case("no GPU", fit("--trainer.accelerator=gpu"), 1, ("trainer.accelerator is gpu", "cpu or auto", "doctor")),
]
