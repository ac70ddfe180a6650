import models
CONDITIONINGS = models.CONDITIONINGS
def build_dit(name, conditioning="adaln-zero", **config): return models.DiT_models[name](conditioning=conditioning, **config)
def model_config(model): return model.config
