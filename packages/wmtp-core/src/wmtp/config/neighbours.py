"""Keys of other tools, and what says the same here.

For people who come from TRL, axolotl, LLaMA-Factory or Unsloth.
"""

from __future__ import annotations

from typing import Final

__all__ = ["NEIGHBOURS", "known_elsewhere"]

_BATCH: Final = (
    "data.train.batch_size, the rows of a whole step, and data.train.micro_batch_size, those that a device computes at once;"
    " gradients accumulate by themselves"
)
_LENGTH: Final = "data.train.max_length"
_EPOCHS: Final = "train.epochs"
_MODEL: Final = "models.base.uri"
_DATA: Final = "a table [datasets.NAME] with type and uri"
_PROMPT: Final = "data.train.learn_prompt: by default completions are learned and prompts are not"
_PRECISION: Final = 'devices.precision ("fp32", "bf16", "bf16-params", "fp8")'
_TRACKER: Final = "tracker.type"
_HOLDOUT: Final = "data.eval.holdout, or data.eval.sources"
_STOPPING: Final = "train.early_stopping"
_FSDP: Final = "devices.fsdp (FSDP2; there is no DeepSpeed)"
_UPLOAD: Final = "run.push_to, or wmtp push RUN URI afterwards"
_TOKEN: Final = "no key: the environment variable HF_TOKEN, or hf auth login"

#: name elsewhere → what is written here; names of one meaning share a line
NEIGHBOURS: Final = {
    name: here
    for names, here in {
        "per_device_train_batch_size micro_batch_size": _BATCH,
        "gradient_accumulation_steps": _BATCH,
        "per_device_eval_batch_size eval_batch_size": "data.eval.batch_size",
        "num_train_epochs num_epochs": _EPOCHS,
        "max_steps": "train.max_steps",
        "learning_rate lr": "optimizer.lr",
        "lr_scheduler_type lr_scheduler": "schedule.type",
        "warmup_steps": "schedule.warmup_steps",
        "warmup_ratio": "schedule.warmup_ratio",
        "optim": "optimizer.type",
        "weight_decay": "optimizer.weight_decay",
        "adam_beta1 adam_beta2": "optimizer.betas",
        "adam_epsilon": "optimizer.eps",
        "max_grad_norm": "train.max_grad_norm",
        "max_length max_seq_length max_seq_len sequence_len cutoff_len": _LENGTH,
        "packing sample_packing": "data.train.packing",
        "eval_on_start": "train.eval_start",
        "dataset_text_field text_column": 'datasets.NAME.keys, as in keys = { text = "content" }',
        "template": "data.train.chat_template; by default the model's own",
        "trust_remote_code": "no key: a folder's own code is never run",
        "hf_token hub_token token": _TOKEN,
        "dataloader_num_workers dataset_num_proc preprocessing_num_workers": "no key: all cores tokenize",
        "use_cpu no_cuda": "devices.device",
        "nproc_per_node num_processes gpus num_gpus": "no key: torchrun starts the processes",
        "load_in_8bit": 'no key: a base is kept in 4 bits, models.base.quantize = "nf4", or whole',
        "group_by_length": "no key: data.train.packing = false puts rows of like length together",
        "completion_only_loss assistant_only_loss train_on_inputs train_on_prompt": _PROMPT,
        "dataset_name dataset_path train_file datasets_path dataset train_data": _DATA,
        "val_set_size validation_split eval_dataset": _HOLDOUT,
        "model_name_or_path base_model model_name model_id model": _MODEL,
        "report_to use_wandb wandb": _TRACKER,
        "wandb_project": "tracker.project of the tracker wandb",
        "logging_steps": "train.log_interval",
        "eval_steps eval_strategy evaluation_strategy": "train.eval_interval",
        "save_steps save_strategy": "checkpoints.save_interval",
        "save_total_limit": "checkpoints.keep_last",
        "load_best_model_at_end metric_for_best_model early_stopping_patience": _STOPPING,
        "resume_from_checkpoint auto_resume_from_checkpoints": "no key: wmtp run --resume RUN_DIR",
        "output_dir": "run.output_dir",
        "run_name": "run.name",
        "seed data_seed": "run.seed",
        "fp16 bf16 tf32 torch_dtype dtype": _PRECISION,
        "lora_r lora_rank r": "models.base.lora.rank",
        "lora_alpha": "models.base.lora.alpha",
        "lora_target lora_target_modules lora_target_linear target_modules": "models.base.lora.targets",
        "lora_dropout": "no key: adapters learn without dropout",
        "use_dora lora_use_dora peft_use_dora": "models.base.lora.dora",
        "use_rslora peft_use_rslora": "models.base.lora.rslora",
        "adapter finetuning_type use_peft peft_config qlora": "a table [models.base.lora]",
        "load_in_4bit bnb_4bit_quant_type quantization_bit quantization_config": 'models.base.quantize = "nf4"',
        "gradient_checkpointing use_gradient_checkpointing": "devices.activation_checkpointing",
        "torch_compile": "devices.compile",
        "attn_implementation flash_attention flash_attn": "models.base.attn_implementation",
        "deepspeed fsdp_config": _FSDP,
        "push_to_hub hub_model_id": _UPLOAD,
        "use_liger_kernel": "no key: the loss never makes all logits at once anyway",
    }.items()
    for name in names.split()
}


def known_elsewhere(name: str) -> str | None:
    """Say what another tool's key is here, for a message.

    None for a name that no other tool has.
    """
    here = NEIGHBOURS.get(name.lower().replace("-", "_"))
    if here is None:
        return None
    return f"a key of other tools; here {'there' if here.startswith('no key') else 'it'} is {here}"
