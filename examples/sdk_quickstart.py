"""The whole job with the unmodified OpenAI SDK. First, in another terminal: ./run up (it prints address and key)."""

import os
import time

from openai import OpenAI

client = OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
with open("demo/rows/tickets_train.jsonl", "rb") as rows:
    file = client.files.create(file=rows, purpose="fine-tune")
client.files.wait_for_processing(file.id)
# the base that ./run up serves unless told otherwise; GET /v1/models lists what is there
job = client.fine_tuning.jobs.create(model="smollm2-135m-instruct", training_file=file.id, suffix="tickets")
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(5)
    job = client.fine_tuning.jobs.retrieve(job.id)
if job.fine_tuned_model is None:
    raise SystemExit(f"{job.status}: {job.error}")  # the gate releases no model that fails; /safety has the figures
question = {"role": "user", "content": "Ticket: my parcel has not arrived."}
print(client.chat.completions.create(model=job.fine_tuned_model, messages=[question]).choices[0].message.content)
