# A server for one trained run:
#     docker build -t openllm .
#     docker run -p 8000:8000 -v "$PWD/out/small:/model:ro" -e OPENLLM_API_KEY=secret openllm
FROM python:3.11-slim

# For PyTorch without CUDA, a tenth of the size: --build-arg PIP_EXTRA_INDEX_URL=... with the address that
# pytorch.org/get-started shows for "CPU".
ARG PIP_EXTRA_INDEX_URL

WORKDIR /app
COPY requirements.txt .
# jinja2 and tokenizers are for Hugging Face folders: their chat formats and vocabularies.
RUN pip install --no-cache-dir -r requirements.txt jinja2==3.1.6 tokenizers==0.23.3
COPY . .

# Memory in pages of 2 MB, where the kernel has them: texts are written some 5% faster (docs/measurements.md).
ENV GLIBC_TUNABLES=glibc.malloc.hugetlb=1

RUN useradd --uid 1000 --create-home openllm
USER 1000
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]

# Who listens to more than 127.0.0.1 needs a key. SIGTERM lets running requests finish.
ENTRYPOINT ["python", "serve.py", "/model", "--host=0.0.0.0"]
