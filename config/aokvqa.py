# InternVL3-1B on A-OKVQA, multiple choice. Expected accuracy: not measured yet (chance 25.0;
# fine-tuned PaliGemma-3B has 76.4 to 76.9). One GPU of 24 GB or more; by the steps measured
# on an H100 a night (8 to 10 hours).
#     python prepare.py && python train.py config/aokvqa.py --max_latent_stage=4
dataset = 'HuggingFaceM4/A-OKVQA'
data_dir = 'data/aokvqa'
out_dir = 'out'
init_from = 'OpenGVLab/InternVL3-1B-Pretrained'  # the chat model: template='chatml'

c_thought = 2
max_latent_stage = 4
epochs_stage0 = 8
epochs_per_stage = 3
visual_bridge = True         # words that lead from the image to the steps
pad_latent_to_max = True     # rationales have one to four steps: the same thoughts for all
reset_optimizer = True

max_tiles = 8                # 640x480 becomes 6 tiles and a thumbnail: 1792 visual tokens
max_length = 2560
batch_size = 32              # global; Coconut used 128
micro_batch_size = 16        # what one GPU holds at a time: a thought costs a pass, not a row
learning_rate = 5e-5         # try 1e-5 for the chat checkpoint: instruct models want less
freeze_vision = True         # 17,056 questions are few for 300M parameters that see well
activation_checkpointing = True
dtype = 'bfloat16'
num_workers = 4              # for each GPU
