"""Family packages on a folder, S3, Google Cloud Storage, the Hugging Face hub: every place that fsspec knows.

    <url>/objects/ab/ab12…                    pieces of files, each under its own SHA-256
    <url>/packages/<name>/<version>.json      which pieces make which file; the version is its SHA-256
    <url>/packages/<name>/latest.json         the version that was pushed last

Objects come first, the version refers to them, and the name is moved last, each in one step: a
pull meanwhile gets the version before. Nothing that is there is ever changed but `latest.json`, so that
two that push at once only do work twice, and a push that was interrupted resumes where it was.
"""
