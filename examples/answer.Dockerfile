# A machine that only answers (docs/answer.md), as an image without torch. From the root of a checkout:
#     docker build -t gossamer-answer -f examples/answer.Dockerfile .
#     docker run -v gossamer-answer:/state --network host gossamer-answer INVITE --url http://127.0.0.1:11434/v1 --model NAME
FROM python:3.12.12-slim-bookworm
RUN useradd --uid 10001 --create-home gossamer && install -d -o gossamer -g gossamer /state
WORKDIR /opt/gossamer
COPY examples examples
RUN pip install --no-cache-dir -r examples/answer-requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY collectives collectives
COPY node node
# What is installed is this project, by its path.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-deps .
ENV PYTHONUNBUFFERED=1
USER 10001
WORKDIR /state
VOLUME /state
ENTRYPOINT ["gossamer", "answer", "--state", "/state"]
