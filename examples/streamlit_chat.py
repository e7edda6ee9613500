"""A chat page in Streamlit over the API of `glm serve`: streamlit run examples/streamlit_chat.py"""

import os

import streamlit as st
from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("GLMKIT_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("GLMKIT_API_KEY", "none"),
)
st.set_page_config(page_title="ChatGLM")
st.title("ChatGLM")
with st.sidebar:
    model = st.selectbox("model", [one.id for one in client.models.list()])
    system = st.text_area("system prompt")
    top_p = st.slider("top_p", 0.0, 1.0, 0.8)
    temperature = st.slider("temperature", 0.0, 1.5, 0.95)
    length = st.slider("longest answer in tokens", 5, 4096, 512)
    if st.button("clear") or "messages" not in st.session_state:
        st.session_state.messages = []
messages = st.session_state.messages
for message in messages:
    st.chat_message(message["role"]).markdown(message["content"])
if question := st.chat_input("message"):
    st.chat_message("user").markdown(question)
    messages.append({"role": "user", "content": question})
    asked = [{"role": "system", "content": system}] * bool(system) + messages
    settings = {"top_p": top_p, "temperature": temperature, "max_tokens": length}
    with client.chat.completions.create(model=model, messages=asked, stream=True, **settings) as stream:
        pieces = (chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        answer = st.chat_message("assistant").write_stream(pieces)
    messages.append({"role": "assistant", "content": answer})
