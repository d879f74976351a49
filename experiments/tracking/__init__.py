"""Multi-object tracking: files, detections, motion, trackers, measures.

`mot_files` reads and writes the format of MOTChallenge, `detections` simulates
detections from a truth, `motion` is a Kalman filter with features for the score
`network`. `tracker` tracks online and `near_online` with several hypotheses;
`baselines` are classical affinities. `judging` tunes and measures trackers,
`evaluation` measures files of results, and `track` is the program for files of
detections. Measures need the extra `mot`.
"""
