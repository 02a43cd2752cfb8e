# docker build -t nora-lab . && docker run -p 7860:7860 -v nora-lab:/data nora-lab        (add --gpus all where there is one)
FROM python:3.12-slim

RUN apt-get update && apt-get install -y --no-install-recommends tini fonts-dejavu-core && rm -rf /var/lib/apt/lists/* \
    && useradd -m -u 1000 user && install -d -o user -g user /data

USER user
ENV HOME=/home/user \
    PATH=/home/user/.local/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GRADIO_ANALYTICS_ENABLED=False \
    LAB_HOME=/data/lab \
    HF_HOME=/data/huggingface \
    GRADIO_TEMP_DIR=/tmp/nora-lab-page
WORKDIR /home/user/app

COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --user -r requirements.txt
COPY --chown=user app.py README.md ./
COPY --chown=user lab lab
COPY --chown=user assets assets

EXPOSE 7860
ENTRYPOINT ["tini", "--"]
CMD ["python", "app.py", "--host", "0.0.0.0", "--port", "7860"]
