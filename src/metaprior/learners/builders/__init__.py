"""What learners are built from: gradient steps, embeddings, networks that read the support, variational fits."""
