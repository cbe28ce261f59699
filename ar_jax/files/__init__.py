"""What lies on disk: model folders and the JSON that describes a model, files of weights, pictures."""
