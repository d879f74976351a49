"""Multi-object tracking: files, detections, motion, trackers, measures.

`mot_files` reads and writes the MOTChallenge format. `detections` simulates
detections from ground truth. `motion` is a Kalman filter with features for the
scoring `network`. `tracker` tracks online, `near_online` keeps several
hypotheses, and `baselines` are classical affinities. `judging` tunes and scores
trackers, `evaluation` scores result files, and `track` is the command for
detection files. Measures need the extra `mot`.
"""
