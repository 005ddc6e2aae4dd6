"""A process that follows a fleet by the blocking calls. For each line on its input it generates, and prints the result.

python following.py URL KEY
"""

import json
import sys

from millrace import GenerateRequest, SamplingParams
from millrace.sync import follow_fleet

with follow_fleet(sys.argv[1], sys.argv[2]) as fleet:
    print(json.dumps({"version": fleet.version}), flush=True)
    for line in sys.stdin:
        sampling = SamplingParams(12, temperature=0.0, ignore_eos=True)
        request = GenerateRequest((5, 17, 300, 42, 8), sampling, request_id=line.strip())
        made = fleet.generate(request, deadline=60.0)
        spans = [[span.version, fleet.labels.get(span.version or 0), span.end] for span in made.version_spans]
        print(json.dumps({"ids": made.output_ids, "spans": spans, "version": fleet.version}), flush=True)
