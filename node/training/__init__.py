"""Training: from weighted completions to the next version of the policy.

trainer         TRL's GRPOTrainer on rounds of our own
saving          its checkpoints: the order of a save, and how a run goes on
texts           questions and texts as tokens of the local policy
batch           from samples to tensors
checkpoint      folders that are whole or absent
snapshot        a copy in main memory, to write a checkpoint from
ranks           several processes that train one node: who says what to whom
processes       how they are started, and what happens when one of them dies
follower        what each of them but the first does
budget          what a node has spent, and when that ends it
evaluation      scoring a policy on questions that training never asks
likelihood      how likely completions are, without a gradient
surprise        how unlikely peers' completions are to this node
shared_prefix   a group's prompt computed once
head            the logits of completions alone, some positions at a time
"""
