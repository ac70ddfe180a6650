"""Speed, one command per question: python -m benchmarks.{train,sample,dataloading,checkpointing,diffusion_overhead}.

Times depend on the machine; compare only numbers of one run.
"""
