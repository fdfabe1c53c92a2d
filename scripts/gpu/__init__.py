"""What scripts/gpu_session.sh measures on one GPU, and the page that is made of it."""
