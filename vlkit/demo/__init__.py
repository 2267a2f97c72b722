"""The whole of vlkit at work in a few minutes; `vlkit demo` runs it.

compose -> train -> save -> load in a fresh process -> transcribe -> page

run.py holds these steps. digits.py and strips.py make the data, task.py turns strips into batches and answers, train.py
learns for a given time while progress.py tells, transcribe.py is the fresh process, report.py writes the page.
"""
