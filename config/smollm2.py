# Coconut itself on a small pretrained text decoder, SmolLM2-135M, with the colour chain in words.
# Any Qwen2, Qwen3 or Llama goes the same way, by --init_from=Qwen/Qwen3-0.6B or a folder.
# What came of it: experiments/RESULTS.md.
#     python prepare.py config/smollm2.py && python train.py config/smollm2.py
dataset = 'words'            # or --dataset=prosqa_train.json, Coconut's own file
data_dir = 'data/words'
out_dir = 'out-smollm2'
init_from = 'HuggingFaceTB/SmolLM2-135M'
train_rows = 960
val_rows = 100
test_rows = 200
seed = 0

template = 'plain'           # 'chat' for a chat model's own turns
prompt = '{question}\n'
answer = '{answer}'
max_length = 512
max_new_tokens = 48

c_thought = 2                # Coconut has 1 for texts like these
max_latent_stage = 4
epochs_stage0 = 2
epochs_per_stage = 1

batch_size = 16
eval_batch_size = 50
learning_rate = 1e-4
warmup_steps = 20
log_interval = 10
