"""Every name of vLLM that is used at run time: one list for all that checks them.

Little of this is vLLM's public interface. What is imported, called, overridden or read is listed
here. :mod:`vllm_ssd.compat` looks for it in the vLLM that is installed, at the start and for
``vllm-ssd doctor``; a test looks for it in the sources of the other versions that are supported.
The lists were made from vLLM 0.32 and 0.33; the code tells these apart by the names they have, not
by version numbers. A test compares the lists with the names our code uses.
"""

from __future__ import annotations

from collections.abc import Mapping

LOGITS_PROCESSOR_ARGUMENTS = ("lm_head", "hidden_states", "embedding_bias")
"""The arguments with which a model calls its ``LogitsProcessor``, in this order."""

Names = Mapping[str, str]
"""By module, or ``module:object``: the members that are used. What is called with arguments, or
overridden, has its first parameters in parentheses, after "|" those that are passed by name."""

TARGET: Names = {
    "vllm.engine.arg_utils:EngineArgs": (
        "_api_process_count _api_process_rank "
        "create_speculative_config(self target_model_config target_parallel_config) "
        "additional_config async_scheduling create_load_config(self) gdn_prefill_backend "
        "kda_decode_backend kda_prefill_backend spec_method spec_model spec_tokens "
        "speculative_config"
    ),
    "vllm.config": "ModelConfig",
    "vllm.config:CUDAGraphMode": "has_full_cudagraphs(self) separate_routine(self)",
    "vllm.config:LoadConfig": "download_dir",
    "vllm.config:VllmConfig": (
        "additional_config cache_config compilation_config instance_id load_config model_config "
        "parallel_config scheduler_config speculative_config"
    ),
    "vllm.config:ModelConfig": (
        "attention_chunk_size dtype enforce_eager get_head_size(self) get_hidden_size(self) "
        "get_num_experts(self) get_sliding_window(self) get_total_num_hidden_layers(self) "
        "get_total_num_kv_heads(self) get_vocab_size(self) hf_config hf_text_config hf_token "
        "is_attention_free is_encoder_decoder is_hybrid is_multimodal_model max_model_len model "
        "original_max_model_len quantization runner_type served_model_name tokenizer "
        "tokenizer_revision trust_remote_code try_get_generation_config(self) use_mla uses_mrope"
    ),
    "vllm.config:ParallelConfig": (
        "assigned_physical_gpu_ids data_parallel_size distributed_executor_backend "
        "local_world_size pipeline_parallel_size prefill_context_parallel_size "
        "tensor_parallel_size use_ray use_ubatching worker_cls world_size"
    ),
    "vllm.config:CacheConfig": "enable_prefix_caching gpu_memory_utilization kv_cache_memory_bytes",
    "vllm.config:CompilationConfig": "cudagraph_mode",
    "vllm.config:SchedulerConfig": "max_num_seqs",
    "vllm.config:SpeculativeConfig": "num_speculative_tokens",
    "vllm": "envs",
    "vllm.envs": "VLLM_CPU_OMP_THREADS_BIND VLLM_USE_V2_MODEL_RUNNER",
    "vllm.platforms": "current_platform",
    "vllm.platforms:current_platform": (
        "device_control_env_var device_count device_name is_cpu "
        "logical_device_id_to_visible_device_id"
    ),
    "vllm.distributed.parallel_state": "get_tp_group",
    "vllm.distributed.parallel_state:GroupCoordinator": (
        "broadcast(self input_ src) broadcast_object(self obj src)"
    ),
    "vllm.model_executor.model_loader": "get_model_loader",
    "vllm.triton_utils": "HAS_TRITON",
    "vllm.utils.import_utils": "resolve_obj_by_qualname",
    "vllm.utils.torch_utils": (
        "async_tensor_h2d(data | device) kv_cache_dtype_str_to_dtype resolve_kv_cache_dtype_string"
    ),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "finished_req_ids num_scheduled_tokens scheduled_new_reqs scheduled_spec_decode_tokens "
        "total_num_scheduled_tokens"
    ),
    "vllm.v1.core.sched.output:NewRequestData": (
        "lora_request mm_features prompt_embeds prompt_token_ids req_id sampling_params"
    ),
    "vllm.v1.kv_cache_interface:KVCacheSpec": "max_memory_usage_bytes(self vllm_config)",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": (
        "lora_request mm_features num_prompt_tokens prompt_embeds prompt_token_ids sampling_params"
    ),
    "vllm.sampling_params:SamplingParams": (
        "eos_token_id ignore_eos max_tokens min_tokens stop_token_ids structured_outputs "
        "temperature top_k top_p"
    ),
    "vllm.v1.worker.gpu_worker": "Worker",
    "vllm.v1.worker.gpu_worker:Worker": (
        "__init__(self vllm_config) compile_or_warm_up_model(self) "
        "determine_available_memory(self) discard(self tags) execute_model(self scheduler_output) "
        "get_kv_cache_spec(self) init_device(self) shutdown(self) sleep(self level) "
        "update_max_model_len(self max_model_len) wake_up(self tags)"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
        "_get_spec_decode_draft_probs(self spec_decode_metadata) "
        "propose_draft_token_ids(self scheduler_output)"
    ),
    "vllm.v1.metrics.loggers": "StatLoggerBase",
    "vllm.v1.metrics.loggers:StatLoggerBase": (
        "__init__(self vllm_config engine_index) log(self) log_engine_initialized(self) "
        "record(self)"
    ),
    "vllm.v1.sample": "rejection_sampler",
    "vllm.v1.sample.metadata:SamplingMetadata": "all_greedy generators temperature",
    "vllm.v1.sample.rejection_sampler": "RejectionSampler",
    "vllm.v1.sample.rejection_sampler:RejectionSampler": (
        "__init__(self sampler spec_config device) "
        "forward(self metadata draft_probs logits sampling_metadata)"
    ),
    "vllm.v1.sample.sampler:Sampler": "forward(self logits sampling_metadata predict_bonus_token)",
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": "max_spec_len",
}

TARGET_ON_CPU: Names = {
    "vllm.utils.cpu_resource_utils": "parse_id_list(raw_str)",
    "vllm.v1.worker.cpu_worker": "CPUWorker",
    "vllm.v1.sample.rejection_sampler": (
        "GREEDY_TEMPERATURE expand_batch_to_tokens(x cu_num_tokens num_tokens replace_from "
        "replace_to) generate_uniform_probs(num_tokens num_draft_tokens generators device) "
        "rejection_sample(draft_token_ids num_draft_tokens max_spec_len cu_num_draft_tokens "
        "draft_probs target_logits bonus_token_ids sampling_metadata synthetic_mode "
        "synthetic_conditional_rates use_fp64_gumbel)"
    ),
}

TARGET_V2: Names = {
    "vllm.config:VllmConfig": "use_v2_model_runner",
    "vllm.v1.core.sched.output:SchedulerOutput": "preempted_req_ids",
    "vllm.v1.core.sched.output:NewRequestData": "prefill_token_ids prompt_len",
    "vllm.v1.worker.gpu.buffer_utils": "UvaBuffer(size dtype)",
    "vllm.v1.worker.gpu.buffer_utils:UvaBuffer": "np uva(self)",
    "vllm.v1.worker.gpu.input_batch:InputBatch": "idx_mapping idx_mapping_np num_reqs",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": "add_requests(self scheduler_output)",
    "vllm.v1.worker.gpu.spec_decode.speculator": "BaseSpeculator",
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator": (
        "init_cudagraph_manager(self cudagraph_mode) capture(self) propose(self input_batch "
        "attn_metadata slot_mappings last_hidden_states aux_hidden_states num_sampled "
        "num_rejected last_sampled next_prefill_tokens temperature seeds dp_sync_state dummy_run "
        "skip_attn_for_dummy_run mm_inputs is_profile num_speculative_tokens)"
    ),
}
"""Only used with vLLM's V2 model runner."""

WORKER = (
    "model_runner._draft_prob_req_ids",
    "model_runner._draft_probs",
    "model_runner.device",
    "model_runner.drafter",
    "model_runner.effective_drafter_max_model_len",
    "model_runner.input_batch.all_greedy",
    "model_runner.input_batch.req_ids",
    "model_runner.rejection_sampler",
    "model_runner.requests",
    "model_runner.sampler",
    "model_runner.speculative_config",
    "parallel_config",
    "rank",
    "vllm_config",
)
"""What is used of the target's worker, checked once it has its device."""

V2_WORKER = (
    "model_runner.req_states.all_token_ids.gpu",
    "model_runner.req_states.device",
    "model_runner.req_states.draft_tokens",
    "model_runner.req_states.last_sampled_tokens",
    "model_runner.req_states.max_num_reqs",
    "model_runner.req_states.req_id_to_index",
    "model_runner.req_states.total_len.gpu",
    "model_runner.req_states.vocab_size",
    "model_runner.speculator",
    "parallel_config",
    "rank",
    "vllm_config",
)
"""The same with the V2 runner."""

DRAFT: Names = {
    "vllm.config": "CUDAGraphMode set_current_vllm_config(vllm_config)",
    "vllm.config:CUDAGraphMode": "FULL NONE",
    "vllm.config:VllmConfig": "cache_config model_config parallel_config scheduler_config",
    "vllm.config:CacheConfig": "kv_cache_layout kv_cache_memory_bytes num_gpu_blocks",
    "vllm.config:ModelConfig": "dtype get_hidden_size(self) get_vocab_size(self) max_model_len",
    "vllm.config:ParallelConfig": "cp_kv_cache_interleave_size",
    "vllm.config:SchedulerConfig": "max_num_batched_tokens max_num_seqs",
    "vllm.engine.arg_utils": "EngineArgs(| cudagraph_capture_sizes)",
    "vllm.engine.arg_utils:EngineArgs": "create_engine_config(self)",
    "vllm.envs": "enable_envs_cache",
    "vllm.forward_context": (
        "BatchDescriptor(num_tokens) set_forward_context(attn_metadata vllm_config | num_tokens "
        "cudagraph_runtime_mode batch_descriptor slot_mapping)"
    ),
    "vllm.forward_context:BatchDescriptor": "num_reqs num_tokens",
    "vllm.model_executor.layers.linear": "UnquantizedLinearMethod",
    "vllm.model_executor.layers.logits_processor": "LogitsProcessor",
    "vllm.model_executor.layers.logits_processor:LogitsProcessor": (
        "forward(self lm_head hidden_states embedding_bias)"
    ),
    "vllm.model_executor.layers.vocab_parallel_embedding": (
        "ParallelLMHead(num_embeddings embedding_dim bias | params_dtype disable_tp) "
        "UnquantizedEmbeddingMethod"
    ),
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding": "quant_method",
    "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod": (
        "process_weights_after_loading(self layer)"
    ),
    "vllm.platforms": "current_platform",
    "vllm.platforms:current_platform": "update_block_size_for_backend(vllm_config)",
    "vllm.utils.hashing": "sha256(input)",
    "vllm.utils.torch_utils": "async_tensor_h2d(data | device)",
    "vllm.v1.attention.backend": (
        "CommonAttentionMetadata(| query_start_loc query_start_loc_cpu seq_lens "
        "seq_lens_cpu_upper_bound num_reqs num_actual_tokens max_query_len max_seq_len "
        "block_table_tensor slot_mapping causal positions)"
    ),
    "vllm.v1.attention.backends.utils": (
        "NULL_BLOCK_ID PAD_SLOT_ID resolve_kv_cache_layout(vllm_config supported_layouts "
        "kv_cache_specs)"
    ),
    "vllm.v1.core.block_pool": "BlockPool(num_gpu_blocks enable_caching hash_block_size)",
    "vllm.v1.core.block_pool:BlockPool": (
        "cache_full_blocks(self request blocks | num_cached_blocks num_full_blocks block_size "
        "kv_cache_group_id) free_blocks(self ordered_blocks) get_cached_block(self block_hash "
        "kv_cache_group_ids) get_new_blocks(self num_blocks) get_num_free_blocks(self) "
        "touch(self blocks)"
    ),
    "vllm.v1.core.kv_cache_utils": (
        "BlockHash KVCacheBlock KVCacheBlockCopy(src_block_id dst_block_id) "
        "hash_block_tokens(hash_function parent_block_hash curr_block_token_ids) "
        "init_none_hash(hash_fn)"
    ),
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": "block_id",
    "vllm.v1.core.single_type_kv_cache_manager": "register_all_kvcache_specs(vllm_config)",
    "vllm.v1.kv_cache_interface": "FullAttentionSpec",
    "vllm.v1.kv_cache_interface:FullAttentionSpec": "block_size sliding_window",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups kv_cache_layout num_blocks",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec",
    "vllm.v1.worker.utils": (
        "copy_kv_cache_blocks_inplace(kv_caches num_blocks kv_cache_block_copies)"
    ),
    "vllm.v1.worker.worker_base": "WorkerWrapperBase(| rpc_rank)",
    "vllm.v1.worker.worker_base:WorkerWrapperBase": (
        "init_worker(self all_kwargs) initialize_from_config(self kv_cache_configs) shutdown(self)"
    ),
    "vllm.v1.worker.gpu_worker:Worker": (
        "compile_or_warm_up_model(self) determine_available_memory(self) get_kv_cache_spec(self) "
        "get_supported_kv_cache_layouts(self) init_device(self) load_model(self) "
        "set_kv_cache_layout(self kv_cache_layout)"
    ),
}

DRAFT_PLANNING: tuple[Names, ...] = (
    {
        "vllm.v1.core.kv_cache_utils": (
            "get_kv_cache_configs(vllm_config kv_cache_specs available_memory)"
        ),
    },
    {
        "vllm.v1.core.kv_cache_planning": (
            "get_global_kv_cache_groups(vllm_config kv_cache_specs) "
            "get_kv_cache_configs(vllm_config kv_cache_specs available_memory | "
            "global_kv_cache_groups)"
        ),
    },
)
"""One of these must be there."""

DRAFT_RUNNER = (
    "attn_groups[0][0].build_metadata",
    "attn_groups[0][0].layer_names",
    "cudagraph_dispatcher.dispatch",
    "device",
    "get_model",
    "input_batch.block_table[0].block_table.gpu",
    "input_batch.block_table[0].slot_mapping.gpu",
    "input_ids.gpu",
    "kv_caches",
    "model.compute_logits",
    "positions",
    "query_start_loc.gpu",
    "seq_lens",
)
"""What is used of the draft's model runner, checked once its KV cache is allocated."""

ENGINE_TITLE = "::EngineCore"
"""Part of the title of vLLM's engine process (``set_process_title``). If that changes, an engine
outlives what has started it, as it does without us (:mod:`vllm_ssd.target.orphaned`)."""
