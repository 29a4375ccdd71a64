# The built-in data set and a model of 0.2M parameters, from scratch. Expected: 100 % of the test
# split (chance 25 %), 10 to 12 % with the thoughts of another image; 3 to 6 minutes, two cores.
#     python prepare.py config/toy.py && python train.py config/toy.py
dataset = 'toy'
data_dir = 'data/toy'
out_dir = 'out-toy'
init_from = 'scratch'
steps_from = 'all'           # each hop is a step
train_rows = 10240
seed = 0

prompt = '<image>{question}\n{choices}\n'  # short: every token costs time here
answer = '{choice} {letter}'               # the letter first is not learnt
max_length = 128
max_new_tokens = 32

c_thought = 2                # 1 is too few: see RESULTS.md
max_latent_stage = 4
epochs_stage0 = 4
epochs_per_stage = 2
learning_rate_stage0 = 3e-3
learning_rate = 5e-4
uniform_prob = 0.2           # without earlier stages mixed in some seeds lose the last stage

hidden_size = 64
intermediate_size = 192
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
rope_theta = 1e4
tie_word_embeddings = True
vision_hidden_size = 32
vision_intermediate_size = 128
vision_num_layers = 1
vision_num_heads = 2
image_size = 84
max_tiles = 1

batch_size = 64
eval_batch_size = 250
beta2 = 0.98
adam_eps = 1e-5              # at 1e-8 a fresh optimizer takes full steps where gradients are near 0
threads = 1                  # a second one brings so small a model little; it loads the data
